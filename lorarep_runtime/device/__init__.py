"""What is particular to devices and to Python's threads beside them."""
