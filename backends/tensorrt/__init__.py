"""TensorRT: engines are built from ONNX files on the device where they run."""
