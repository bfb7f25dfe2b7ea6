"""Data sources by name: digits, CIFAR-10 and image folders, held in memory, and seeded batches of them."""
