"""Around the loop: trainer, callbacks, the run directory."""
