"""The miniature drawn, trained and embedded; not in the wheel."""
