"""Model families as data: configuration in, `DecoderSpec` out. No torch here."""
