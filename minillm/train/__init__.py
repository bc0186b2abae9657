"""Training: one loop for pretraining and fine-tuning, exact to the bit on a CPU."""
