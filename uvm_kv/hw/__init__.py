"""Hardware profiles, model geometry, roofline times and the overlap rules. Every number carries a unit and a source."""
