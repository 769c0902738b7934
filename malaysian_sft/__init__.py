"""The rooms of the trainers, the generator and the scorer: one concept a module."""
