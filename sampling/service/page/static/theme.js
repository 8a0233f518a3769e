// Before anything is painted: the colours that were chosen here, or else the system's.
try {
  const chosen = localStorage.getItem("ditmoe-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing.
}
