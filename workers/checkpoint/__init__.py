"""Reading checkpoint headers, strictly, before anything is allocated. No torch here."""
