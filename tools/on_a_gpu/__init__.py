"""What is claimed of devices, tried on the one that is here: `tools/on_a_gpu.sh`."""
