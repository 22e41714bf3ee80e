"""Routers compared: what each run goes through, and what came of it."""
