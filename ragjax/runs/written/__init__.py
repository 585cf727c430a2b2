"""Questions made from passages: written by the language model, filtered, split, kept in a file."""
