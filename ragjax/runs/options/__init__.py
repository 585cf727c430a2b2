"""Options of the programs: frozen dataclasses that check themselves."""
