"""Which channels hang together: channel labels followed through one forward pass."""
