"""What a model becomes for other programs: ONNX, OpenVINO, Core ML, MLX, GGUF; each is proved equal or refused."""
