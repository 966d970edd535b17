/** How much of a camera's attention lies on the objects of each role, beside what it would be by chance. */

import type { CameraMask, Instance } from "./api";
import { percent } from "./heat";
import type { CameraView } from "./layout";
import type { EpisodeModel } from "./model";
import { isRole, LOOKS, lyingOn, ofRole, rolesOf, timesChance, type Lying, type Role } from "./scene";
import * as state from "./state";

/** What the map that lies over a camera gives to some instances; null where the map or the mask is missing. */
function lyingOf(model: EpisodeModel, view: CameraView, instances: readonly number[]): Lying | null {
  const heat = model.heats.value.find((found) => found.view === view);
  const found = model.maskOf(view.camera.name);
  return heat && found ? lyingOn(heat.values, found.mask, instances) : null;
}

/** An object's name, role and numbers; null where nothing is known. */
export function objectInWords(
  model: EpisodeModel,
  view: CameraView,
  number: number,
): { name: string; role: string; numbers: string } | null {
  const instance = model.facts.value?.scene?.instances[number];
  const lying = lyingOf(model, view, [number]);
  if (!instance || !isRole(instance.role) || !lying) return null;
  const times = timesChance(lying);
  return {
    name: instance.name,
    role: instance.role === instance.name ? "" : instance.role,
    numbers: `${percent(lying.share)} of this camera's attention on ${percent(lying.chance)} of its area${times && `: ${times}`}`,
  };
}

/** A short line as an outline of this role is drawn. */
export function RoleLine({ role }: { role: string }) {
  if (!isRole(role)) return null;
  const { colour, dashes } = LOOKS[role];
  return (
    <svg class="role-line" viewBox="0 0 28 6" aria-hidden="true">
      <line
        x1="1"
        y1="3"
        x2="27"
        y2="3"
        stroke={colour}
        stroke-dasharray={dashes.map((n) => 2.5 * n).join(" ")}
      />
    </svg>
  );
}

/** Frame at which the shown masks were taken, where it is not the shown frame. */
export function olderFrame(model: EpisodeModel): number | null {
  const [shown, timeline] = [model.shown.value, model.timeline.value];
  const frame = shown && timeline?.inference_frame[shown.inference];
  return frame === null || frame === undefined || frame === shown!.frame ? null : frame;
}

const namesOf = (instances: readonly Instance[], role: string) =>
  ofRole(instances, role).map((number) => instances[number]!.name);

function Row(props: { name: preact.ComponentChildren; lying: Lying; nested?: boolean }) {
  const { name, lying, nested } = props;
  const isSeen = lying.chance > 0;
  return (
    <tr class={nested ? "nested" : ""}>
      <th scope="row">{name}</th>
      {isSeen ? (
        <>
          <td class="number">{percent(lying.share)}</td>
          <td class="number">{percent(lying.chance)}</td>
          <td class="number">{timesChance(lying)}</td>
        </>
      ) : (
        <td colSpan={3}>not in view</td>
      )}
    </tr>
  );
}

function RoleRows(props: { role: Role; instances: Instance[]; mask: CameraMask; values: Float32Array }) {
  const { role, instances, mask, values } = props;
  const numbers = ofRole(instances, role);
  const of = (chosen: number[]) => lyingOn(values, mask, chosen);
  return (
    <>
      <Row
        name={
          <>
            <RoleLine role={role} /> {role}
            {numbers.length === 1 && instances[numbers[0]!]!.name !== role && (
              <small> {instances[numbers[0]!]!.name}</small>
            )}
          </>
        }
        lying={of(numbers)}
      />
      {numbers.length > 1 &&
        numbers
          .filter((number) => mask.area[number])
          .map((number) => <Row key={number} nested name={instances[number]!.name} lying={of([number])} />)}
    </>
  );
}

export function ObjectsPanel({ model, id }: { model: EpisodeModel; id: string }) {
  const [facts, view, shown] = [model.facts.value, model.camera.value, model.shown.value];
  const scene = facts?.scene;
  if (!facts || !scene || !view || !shown) return null;
  const heat = model.heats.value.find((found) => found.view === view);
  const found = model.maskOf(view.camera.name);
  const older = olderFrame(model);
  const lacks = !scene.cameras.includes(view.camera.name)
    ? "has no masks"
    : !found
      ? "has no mask at this inference"
      : null;
  return (
    <section class="panel" id={id} aria-labelledby={`${id}-title`}>
      <h2 id={`${id}-title`}>
        On the objects{" "}
        <small>
          camera {view.camera.label}: share of its attention; chance: share of its area
          {older !== null && `; where they were at frame ${older}, when the policy was asked`}
        </small>
      </h2>
      {lacks && (
        <p class="note">
          Camera {view.camera.label} {lacks}.
        </p>
      )}
      {!lacks && heat && found && (
        <table class="objects">
          <thead>
            <tr>
              <th scope="col">role</th>
              <th scope="col" class="number">
                attention
              </th>
              <th scope="col" class="number">
                chance
              </th>
              <th scope="col" class="number">
                ratio
              </th>
            </tr>
          </thead>
          <tbody>
            {rolesOf(scene).map((role) => (
              <RoleRows
                key={role}
                role={role}
                instances={scene.instances}
                mask={found.mask}
                values={heat.values}
              />
            ))}
          </tbody>
        </table>
      )}
    </section>
  );
}

/** Which line is which role, below the cameras; the table has the names. */
export function OutlineLegend({ model }: { model: EpisodeModel }) {
  const scene = model.facts.value?.scene;
  if (!scene || state.outlines.value !== "on" || !model.masks.value) return null;
  const older = olderFrame(model);
  return (
    <ul class="legend outline-legend" aria-label="Outlines">
      {rolesOf(scene).map((role) => (
        <li key={role} title={namesOf(scene.instances, role).join(", ")}>
          <RoleLine role={role} /> {role}
        </li>
      ))}
      {older !== null && <li>as at frame {older}</li>}
    </ul>
  );
}
