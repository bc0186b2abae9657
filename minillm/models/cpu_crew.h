// The threads of one call, and where they wait for each other.
//
// OpenMP's own barrier puts a thread to sleep after a microsecond once the process has more threads in
// OpenMP's pools than it has cores. A server has: the thread that loaded the model keeps its pool.
#pragma once
#include <atomic>
#include <cstdint>
#include <omp.h>
#include <thread>

class Crew {
  std::atomic<int64_t> arrived{0}, round{0};

 public:
  void meet() {
    const int64_t now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == omp_get_num_threads() - 1) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t turn = 0; round.load(std::memory_order_acquire) == now; turn++) {
      if (turn > 4000) std::this_thread::yield();  // another process has the other's core
#ifdef __x86_64__
      else __builtin_ia32_pause();
#endif
    }
  }
};
