"""One client's work: the resident backbone, local training, terms, what the node keeps."""
