"""From a network to a result: padding, tiles, precision, pictures."""
