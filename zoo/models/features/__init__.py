"""Feature networks: image in, one vector out, whose distributions FID and KID compare. One family, one file."""
