"""What is modular in pre-trained models before anything is trained: activations in blocks, experts by task."""
