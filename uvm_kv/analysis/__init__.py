"""From results to tables, verdicts, figures and reports. Reads run directories only; rebuilds everything from them."""
