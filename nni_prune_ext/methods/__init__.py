"""One file = one paper. Methods never import each other; what they share stands in the layers below."""
