"""How restored and generated images are judged; every number carries its protocol."""
