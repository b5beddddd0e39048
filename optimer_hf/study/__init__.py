"""What a study is, what it recorded, and what follows from that; needs no model."""
