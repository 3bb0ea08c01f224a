"""`sld-eval`: how often a bundle shows what it should not, with safety and without.

Prompts in (`prompts`), settings (`settings`), a run that can be stopped and shared (`run`,
`workers`, `ray_run`), a row a picture (`rows`), and a manifest that says what was measured.
Figures from the rows (`results`), and their reports (`write`).
"""
