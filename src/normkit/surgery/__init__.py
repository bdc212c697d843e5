"""Changes of existing models. Models are read and rebuilt by each framework's own module; rules and plans live here."""
