"""OpenVINO, through its own interface, on Intel's and AMD's processors and Intel's devices."""
