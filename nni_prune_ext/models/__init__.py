"""Models to prune: small built-in networks for 32×32 images, and one way to build any other model by name."""
