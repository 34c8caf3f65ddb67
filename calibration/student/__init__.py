"""Teacher and student: the float model, its fake-quantized copy, and the artifact that the copy becomes."""
