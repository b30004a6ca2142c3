"""What people read: tables in the terminal, pages with charts, and the sparsity of any checkpoint."""
