"""ONNX models: for ONNX Runtime, and for TensorRT to build engines from."""
