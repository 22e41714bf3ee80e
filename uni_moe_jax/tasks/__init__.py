"""Task types and the attribute bits that follow from them."""
