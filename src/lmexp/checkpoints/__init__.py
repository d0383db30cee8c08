"""Third-party StyleGAN2 checkpoints, read without running anything that they hold."""
