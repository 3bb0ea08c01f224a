"""ONNX Runtime: its engine, prepared graphs, and tensors that stay on a device."""
