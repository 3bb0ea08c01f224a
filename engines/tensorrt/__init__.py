"""TensorRT and TensorRT-RTX: building plans, describing them, running them."""
