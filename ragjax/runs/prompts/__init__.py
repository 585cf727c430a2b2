"""What the language model of a run reads: templates, chat templates, and the choice of them."""
