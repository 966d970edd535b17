/** The page's colours, for what is drawn on a canvas. */

export interface Ink {
  text: string;
  soft: string;
  line: string;
  shade: string;
  accent: string;
}

let found: Ink | null = null;
const dark = typeof matchMedia === "function" ? matchMedia("(prefers-color-scheme: dark)") : null;
dark?.addEventListener("change", () => (found = null));

/** Read once: asking the browser for a style takes a while. */
export function ink(element: Element): Ink {
  if (!found) {
    // A custom property is told as it was written; only a property of a known type is resolved.
    const probe = document.createElement("span");
    element.parentElement?.append(probe);
    const resolve = (name: string) => {
      probe.style.color = `var(${name})`;
      return getComputedStyle(probe).color;
    };
    found = {
      text: resolve("--text"),
      soft: resolve("--soft"),
      line: resolve("--line"),
      shade: resolve("--shade-executed"),
      accent: resolve("--accent"),
    };
    probe.remove();
  }
  return found;
}
