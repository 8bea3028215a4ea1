"""How an update reaches the tensors of an average."""
