// A text that gets longer, shown as Markdown: only what has changed is made anew.
import { blocksOf, render } from "./markdown.js";

/** Shows texts in `host`. */
export class Written {
  constructor(host) {
    this.host = host;
    this.shown = []; // {source, nodes}
  }

  show(text) {
    const blocks = blocksOf(text);
    let same = 0;
    while (same < blocks.length && same < this.shown.length && this.shown[same].source === source(blocks[same])) same++;
    for (const { nodes } of this.shown.splice(same)) nodes.forEach((node) => node.remove());
    for (const block of blocks.slice(same)) {
      const nodes = render(block);
      this.host.append(...nodes);
      this.shown.push({ source: source(block), nodes });
    }
  }
}

const source = (block) => block.lines.join("\n") + (block.closed ? "\0" : "");
