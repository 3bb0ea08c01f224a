"""Writing ONNX graphs from a config and tensors."""
