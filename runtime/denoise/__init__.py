"""The denoising loop, on the host and on a device."""
