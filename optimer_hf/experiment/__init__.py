"""`optimer run`: a folder of inputs from corpora to the compared merge."""
