"""TensorRT: engines are built where they run, from ONNX."""
