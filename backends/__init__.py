"""Back ends: graphs of kernels become machine code here."""
