"""Distribution vectors: trained minus base, as adapter, checkpoint or delta."""
