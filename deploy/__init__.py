"""How the program gets onto machines, and what people type."""
