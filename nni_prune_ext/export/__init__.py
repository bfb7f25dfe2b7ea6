"""Models as ONNX files: writing them, tracing where they come from, and proving them equal to PyTorch."""
