"""The mind: service, scheduler, KV-block manager and cluster control. No torch here."""
