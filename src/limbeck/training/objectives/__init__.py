"""Further objectives of stage 3, as plug-ins; docs/guides/objectives.md says what each one is and what it was worth."""
