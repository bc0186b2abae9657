"""The pytest markers that transformers' tests carry; their own conftest is not in the archive."""

from typing import Any

NAMES = (
    *("accelerate_tests", "all_flash_attn_test", "flash_attn_test", "flash_attn_3_test"),
    *("flash_attn_4_test", "generate", "is_pipeline_test", "is_training_test", "not_device_test"),
    *("is_fsdp_test", "is_tensor_parallel_test", "is_expert_parallel_test", "slow"),
    *("torch_compile_test", "torch_export_test"),
)


def pytest_configure(config: Any) -> None:
    """Make them known."""
    for name in NAMES:
        config.addinivalue_line("markers", f"{name}: of transformers")
