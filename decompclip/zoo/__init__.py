"""How the bundled backdoored twins are made: recipes as data, and one function that follows them."""
