"""Fine-tuning: one loop for every method, its state on disk, its processes."""
