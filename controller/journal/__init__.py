"""What has been accepted and said, kept so that a killed controller loses nothing."""
